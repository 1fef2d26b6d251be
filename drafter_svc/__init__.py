"""The drafter: a prompt in, its kept spans out.

Reading order: `selection` (chunk scores → kept spans) → `scorers` (whose attention counts) →
`backend` and `cpu_backend` (the pass over the layers) → `pipeline` (one request) → `queue` and
`running_pass` (whose turn) → `host` (the model that is loaded) → `edge`, `inbox`, `service` (the
wire). Beside it, where a landlord gives the weights their GPU memory: `region` → `residency` →
`lease` → `memory_plane`, and `pacing`.
"""

import skim  # noqa: F401 - before gRPC, whose log level it sets
