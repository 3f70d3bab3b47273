"""Which samples are kept: small classes, each with the causes under which it counts what it drops.

``config`` is what a user writes (light to import), ``build`` makes of it what the tasks ask.
"""
