"""The registry's parts: what the catalog says, the store, transfers, pins, locks and the cache."""
