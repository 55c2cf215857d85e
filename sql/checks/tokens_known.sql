-- Every real token has exactly one row, a document and a vocabulary entry.
--
-- Grain:   one row per token with a fault.
-- Reads:   stg_tokens, stg_documents, stg_vocab
-- Units:   n_rows should be 1.
-- Ask it:  is a token without a document, or a document there twice?
select
    stg_tokens.token_id,
    count(*)                                 as n_rows,
    bool_and(stg_documents.key is not null)  as has_document,
    bool_and(stg_vocab.vocab_id is not null) as has_vocab_entry
from stg_tokens
left join stg_documents using (document_id)
left join stg_vocab on stg_vocab.vocab_id = stg_tokens.vocab_id
where stg_tokens.mask
group by stg_tokens.token_id
having n_rows > 1 or not has_document or not has_vocab_entry
order by stg_tokens.token_id;
