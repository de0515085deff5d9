"""The routes: each reads as one sentence."""
