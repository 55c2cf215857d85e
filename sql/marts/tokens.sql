-- The corpus, token by token, readable.
--
-- Grain:   one row per real token; padding is left out.
-- Reads:   stg_tokens, stg_vocab, stg_documents
-- Units:   position counts from 0 inside the sequence.
-- Ask it:  what are the tokens of one document? (filter on key)
create or replace view tokens as
select
    token_id,
    vocab_id,
    stg_vocab.piece,
    document_id,
    stg_documents.key,
    stg_documents.source,
    position
from stg_tokens
join stg_vocab using (vocab_id)
join stg_documents using (document_id)
where mask;
