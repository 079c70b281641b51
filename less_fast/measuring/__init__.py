"""Measuring: full caches, bare policies, Baseline+ and LESS side by side, and what a cache will cost."""
