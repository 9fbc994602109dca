"""One file an op: its public function, its reference formula, and what registers it."""
