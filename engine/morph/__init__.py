"""Function-preserving growth: wider, deeper, larger kernels, a front for larger images; the same function.

A morph makes a child of a parent, checks it (`verify`) and reports its `step`, which a `recipe` keeps and repeats.

- More channels: `widen`, and back: `merge` (`ties`, `fold`). `spaces` says which may grow. For that `tracer` follows
  the unmodified forward: `parent_run` learns which channels belong together, `child_check` proves that a child computes
  copies of what its parent does. `op_rules` and `movement` say what an op does, in the steps of `primitives`.
- Local morphs (`surgery`): `deepen`, `activation`, `decompose`, `kernel_size`, `inputs`, `head`; and `front`.
- What is called and how: `example` (arguments), `copying` (deep copies, views in another dtype), `precision`, `stock`
  (accelerated networks), `custom` (functions that users declare).
- After growing: `standard` (does a library build just this?), `origin` (what a grown file began as), `optimizer`
  carries the training state over, `files` and `store` keep networks, `planner` tells costs.
"""
