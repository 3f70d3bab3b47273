"""``glscl scenes``: evaluation sets for every task, in their official formats, made of scenes.

==============  ===============================================================================================
``request``     what is asked for
``command``     the verb: refuses, writes, records
``sink``        files on their way into a storage
``sets``        one module for each task's format
``sheet``       a picture of a few scenes for people
==============  ===============================================================================================
"""
