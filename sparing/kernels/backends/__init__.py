"""One file a library: thin calls to SDPA, varlen, FlexAttention and xformers, with the reasons why not."""
