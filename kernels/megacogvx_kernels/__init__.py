"""The operations of CogVideoX that are worth a kernel, each beside its plain definition.

One folder per op: `__init__.py` holds the public function (checks, then the choice of an implementation),
`reference.py` the plain definition in torch, which is what a newcomer reads first and what every fast version is held
to. Ops take tensors, process groups and numbers; a wrong argument is a `ValueError` or `TypeError` that names it.
"""
