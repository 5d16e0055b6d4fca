"""A small synthetic world: clips of bouncing balls and speaking faces, with their sound and their captions.

Everything follows from a seed. numpy only. `scenes` says what happens, `captions` says it in words, `picture` and
`sound` show and sound it, `measure` finds it again in any clip.
"""
