"""Pictures and clips composed of real cut-outs, with perfect ground truth: a pure function of (seed, number).

::

    objects.jsonl --> Objects ---+
                                 +--> Scenes.scene(17) --> Scene: image, boxes, masks, captions, questions
    SceneRules (seed, split) ----+    Scenes.clip(17)  --> Scene: frames, motions
                                      Scenes.statements(17) --> a sentence, true of one pair of scenes, not of another

==================  ===================================================================================
``config``          ``SceneRules``: what a user writes about scenes; light to import
``objects``         the table of cut-outs, and their pixels
``colors``          names of colours, told from pixels and given to them
``words``           articles, plurals, numbers
``splits``          which pairs of objects a split may show together
``plans``           what a scene shows: drawn by seed, no pixels yet
``layout``          where it is shown, and the relations that hold
``backgrounds``     what it is shown on
``scene``           a scene: its pixels, boxes and masks, whatever frame
``captions``        sentences about it, with the place of each phrase
``questions``       questions about it, with answers
``statements``      a statement about two scenes, and pairs of which it is true and false
``generator``       ``Scenes``: all of it by number
==================  ===================================================================================

Nothing here knows of tasks, files of datasets, or Ray.
"""
