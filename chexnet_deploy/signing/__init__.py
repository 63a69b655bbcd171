"""Signed bundles: who vouches for a manifest, whom this machine trusts, and which releases it has outgrown.

    signatures.py   manifest.sig, and exactly which bytes are signed
    keys.py         Ed25519 keys (RFC 8032); the only room that imports `cryptography`
    release.py      a model line's releases, and the floor below which none may run
    trust.py        Trust: whose signature is needed; a bundle is opened with it or without

Signed is manifest.json, which names the SHA-256 of every other file. What this can't do is said in trust.py.
"""
