"""One file a Triton kernel: the kernel and its launcher, nothing else. Imported only when a kernel is to run."""
