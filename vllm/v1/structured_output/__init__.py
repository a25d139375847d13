"""Text of a given form: grammars, compiled for the tokenizer, that say before each token which tokens may come.

`spec` turns a request's parameters into one normal form, with what a JSON schema may hold in `schema`. `checker` refuses at the
front door what cannot be compiled, in a process that can be killed. `manager` compiles beside the engine's steps and fills the
masks that the sampler applies, one `constraint` a request. Nothing imports xgrammar before the first such request.
"""
