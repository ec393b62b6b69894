"""What the rooms share: backend choice, the op library, tuned tables, the compiled extension, Triton's parts."""
