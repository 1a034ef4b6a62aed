"""Prompts by name, as published: what `data.question_prompt` and `data.caption_prompt` draw from.

The first of a list is the one that a run is used and judged with. A data set of long answers or long captions wants
prompts of its own: these ask for short ones.
"""

INSTRUCTBLIP_QUESTIONS = (
    'Question: {question} Short answer:',
    '{question}',
    'Question: {question}',
    '{question} A short answer to the question is',
    'Q: {question} A:',
    'Given the image, answer the following question with no more than three words. {question}',
    'Based on the image, respond to this question with a short answer: {question}. Answer:',
    'Use the provided image to answer the question: {question} Provide your answer as short as possible:',
    'What is the answer to the following question? "{question}"',
    'The question "{question}" can be answered using the image. A short answer is',
)
"""InstructBLIP's for short answers (Dai et al. 2023, appendix C); first the one that it is judged with on GQA."""

INSTRUCTBLIP_CAPTIONS = (
    'A short image description:',
    'A short image caption:',
    'A photo of',
    'An image that shows',
    'Write a short description for the image.',
    'Write a description for the photo.',
    'Provide a description of what is presented in the photo.',
    'Briefly describe the content of the image.',
    'Can you briefly explain what you see in the image?',
    'Could you use a few words to describe what you perceive in the photo?',
    'Please provide a short depiction of the picture.',
    'Using language, provide a short account of the image.',
    'Use a few words to illustrate what is happening in the picture.',
)
"""InstructBLIP's for short captions (Dai et al. 2023, appendix C); first the one that it is judged with on NoCaps."""
