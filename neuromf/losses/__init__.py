"""The papers' equations. Torch only; nothing is drawn inside."""
