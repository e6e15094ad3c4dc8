"""One file a backend, and none knows another. Each has two functions:

`attention(inputs)`: (B, H, N, D) in q's dtype.
`why_not(inputs)`: why it cannot compute that, "" when it can; for None, whether it can run on this machine at all.
"""
