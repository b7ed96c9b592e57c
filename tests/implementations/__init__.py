"""GPT-2 by other hands: programs to verify, right ones and ones with a known mistake.

Each module offers ``build(source, dtype, mistake)``, which gives a program, and
``program.dump(ids, chunks)``, its activations by the names of `numpygpt.plans.INTERMEDIATES`.
They were written from GPT-2's description and share no mathematics with `numpygpt` or each other.
`mistakes.MISTAKES` lists what each can do wrong. Import the modules one by one: three need torch.
"""
