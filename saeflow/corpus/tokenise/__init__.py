"""Texts and conversations turned into vocabulary ids that know where they come from. Read `texts` first.

texts      texts become vocabulary ids, with the characters that each token stands for
messages   conversations as a corpus holds them, checked
templates  conversations in a chat template, with what each message became
chats      conversations become vocabulary ids that know their message
"""
