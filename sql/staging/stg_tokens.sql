-- The corpus as it was fed to the model, with padding.
--
-- Grain:   one row per (sequence, position).
-- Reads:   src_tokens, src_hidden (tokens of forgotten and replaced documents are left out)
-- Units:   position counts from 0 inside the sequence; mask is true for real tokens. The token stands for the
--          characters char_start to char_end - 1 of its document's text (null for special tokens and unknown ones). In
--          conversations, role and turn say which message it is part of (null for what the chat template adds), and
--          assistant whether the assistant wrote it. Elsewhere they are null.
-- Ask it:  which document does token 4711 belong to?
create or replace view stg_tokens as
select token_id, vocab_id, document_id, position, mask, char_start, char_end, src_tokens.role, turn, assistant
from src_tokens
anti join src_hidden using (document_id);
