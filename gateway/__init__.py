"""The public edge: takes a prompt once, tees it to a drafter and the target, plans, streams back.

Reading order: `plan` (what is prefilled, and why) → `rendering` (where the chat template's text
lies) → `request` and `edge` (what a caller may ask) → `tee` and `clients` (the two legs) →
`session` (one request from first byte to last token) → `service`.
"""
