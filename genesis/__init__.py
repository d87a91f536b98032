"""What all nodes agree on before block 1: the config, its checks, the ready-made networks, the genesis block."""
