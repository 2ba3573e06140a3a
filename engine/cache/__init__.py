"""Where computed keys and values live: block pool, prefix hashes, a manager per kind of cache. Free of torch."""
