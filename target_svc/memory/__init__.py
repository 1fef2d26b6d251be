"""What memory the target may use: the full context's budget, and the landlord of the drafters.

Reading order: `residency` (states) → `policy` (decisions), both pure → `region` and `gpu_memory`
(what is kept, what is counted) → `keeper` (moves regions) → `lease` and `listener` (the tenants'
door) → `landlord` (the service's and people's door) → `service` (the wire).
"""
