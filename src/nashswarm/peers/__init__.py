"""One file per tool of others, found by its name in params.yaml: what our methods are held against.

A tool is a module with

    Settings                                     a frozen dataclass: the keys that a peer may set
    quantize(job: PeerJob, settings) -> PeerWeights    dequantized weights and the bytes that the tool stores for them

It runs in an environment of its own (constraints-peers.txt), by `nashswarm.peering`; so it imports its tool inside of
`quantize`, and settings are checked without it. What it raises becomes the reason for which a peer was not run. Bytes
are those of the tool's own format, headers included; what the tool leaves alone is stored as our baselines store it.
`tests/test_peers.py` checks every file here against this contract.
"""
