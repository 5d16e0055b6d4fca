"""The recipe of the trained tiny Ovi: its codecs, its network and its files, made from `tiny_world` and a seed."""
