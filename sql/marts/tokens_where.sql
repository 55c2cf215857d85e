-- Tokens where a feature is stronger than a threshold: all of them.
--
-- Grain:   one row per token at which value > threshold, in corpus order.
-- Reads:   stg_feature_major (only the row groups of this feature), stg_tokens, stg_vocab, stg_documents
-- Units:   value is in the units of the activations; position counts from 0 inside the sequence.
-- Parameters: feature bigint, threshold double = 0
-- Ask it:  where does feature 12 exceed 0.5?  from tokens_where(12, 0.5)
create or replace macro tokens_where(feature, threshold := 0) as table
with firing as materialized (
    select token_id, value from stg_feature_major where feature_id = feature and value > threshold
),
-- Materialised, so that only these tokens, not the corpus, meet vocabulary and documents.
hits as materialized (
    select token_id, firing.value, stg_tokens.vocab_id, stg_tokens.document_id, stg_tokens.position
    from firing
    join stg_tokens using (token_id)
)
select token_id, hits.value, stg_vocab.piece, stg_documents.key, stg_documents.source, hits.position
from hits
join stg_vocab using (vocab_id)
join stg_documents using (document_id)
order by token_id;
