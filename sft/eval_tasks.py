"""The tasks of lm_eval that run_eval.sh measures by default, and that prepare_data.py keeps out of the training data.

One list for both, so that no score counts answers that were trained on.
"""

# The longest first, for several devices.
PLAIN = ("mmlu", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "lambada_openai")
CHAT = ("ifeval", "gsm8k")  # of the chat pass, CHAT_TEMPLATE=1: answers that are generated and can be checked
MEASURED = PLAIN + CHAT
