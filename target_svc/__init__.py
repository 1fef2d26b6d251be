"""The target: prefills what was kept and answers. Two processes, one package.

Reading order of the service process: `compaction` (spans → ids and positions) → `request` (what is
asked, planned, answered) → `routing` (which context) → `admission` and `seat` (whose turn) →
`answer` and `stop_text` (tokens → text) → `pipeline` (one request) → `target` (the process's state)
→ `edge`, `inbox`, `service` (the wire). The engine child is `llama/`; `engine_client`, `messages`
and `frames` are how the two talk.
"""
