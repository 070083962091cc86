"""Function-preserving growth of trained networks: wider, deeper, larger kernels, or a front for larger images.

A morph builds a child from a parent, checks it (`verify`) and reports its `step`. A `recipe` stores and repeats steps.

- Channels: `widen` adds them and `merge` (`fold`) removes copies. `spaces` lists which channels can grow.
  `tracer` follows the unmodified forward: `parent_run` groups channels that grow together, and `child_check` proves
  that a child computes copies of its parent's values. `op_rules` expresses each op in `primitives`.
- Local morphs (`surgery`): `deepen`, `activation`, `decompose`, `kernel_size`, `inputs`, `head`; and `front`.
- Calling a network: `example` (arguments), `copying` (deep copies, views in another dtype), `running`, `stock`
  (accelerated networks).
- After growing: `optimizer` maps the training state, `files` and `store` save networks and find the one that a grown
  file began as, `planner` computes costs.
"""
