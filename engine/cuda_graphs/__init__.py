"""Captures tiles or whole steps as CUDA graphs and replays them: signatures of tiles, and static buffers."""
