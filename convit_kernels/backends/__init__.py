"""One file a backend: each has `attention(q, k, v, pos_weight, gate, grid, scale, dropout_p)` and no other knows it."""
