"""The offload runtime: expert store, slots, cache policies, transfers, planners."""
