"""What a config costs, in closed form: memory, bytes sent, seconds, hours; no GPU and no process group is needed.

`parameters` lists the weights of one pipeline stage, `workload` says what packs a step has, `memory` and
`communication` count what one rank keeps and sends, `machine` knows the GPUs, `prediction` puts them together,
`suggest` tries all layouts, `command` prints.
"""
