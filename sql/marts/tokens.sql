-- The corpus as readable tokens.
--
-- Grain:   one row per real token, in corpus order; padding is left out.
-- Reads:   stg_tokens, stg_vocab, stg_documents
-- Units:   position counts from 0 inside the sequence. The token stands for the characters char_start to char_end - 1
--          of its document's text, counted from 0 as Python and DuckDB's substr do (Unicode code points). Both are null
--          for special tokens and if the tokenizer gives none. In conversations, role and turn (from 0) say which
--          message the token is part of (null for what the chat template adds), and assistant whether the assistant
--          wrote it. Elsewhere they are null.
-- Ask it:  what are the tokens of one document? (filter on key)
create or replace view tokens as
select
    stg_tokens.token_id,
    stg_tokens.vocab_id,
    stg_vocab.piece,
    stg_tokens.document_id,
    stg_documents.key,
    stg_documents.source,
    stg_tokens.position,
    stg_tokens.char_start,
    stg_tokens.char_end,
    stg_tokens.role,
    stg_tokens.turn,
    stg_tokens.assistant
from stg_tokens
join stg_vocab on stg_vocab.vocab_id = stg_tokens.vocab_id
join stg_documents on stg_documents.document_id = stg_tokens.document_id
where stg_tokens.mask
order by stg_tokens.token_id;
