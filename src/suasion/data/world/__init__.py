"""A small world with a known truth: the data of the demonstration and of the tests.

People ask how to set an invented kitchen robot, others answer well or badly, and readers vote. The
votes come from `quality`, which reads any text, so what a model has really learned can be measured
and not only guessed.

    facts.py     the 24 settings that are right
    grammar.py   the sentences
    compose.py   questions and answers out of facts and sentences
    quality.py   the hidden worth of an answer
    dump.py      votes, and the files of a Stack Exchange dump
"""

from suasion.data.world.dump import write_dump
from suasion.data.world.facts import SITE
from suasion.data.world.quality import BEST, WORST, features, gold_score, quality

__all__ = ["BEST", "SITE", "WORST", "features", "gold_score", "quality", "write_dump"]
