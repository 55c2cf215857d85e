-- All tokens at which a feature is beyond a threshold.
--
-- Grain:   one row per token at which value > threshold, in corpus order. In a signed run a threshold below zero asks
--          for the other side: value < threshold.
-- Reads:   tokens_of_feature, stg_vocab, stg_document_places, stg_shape, vocab_id_of, is_beyond
-- Units:   value is in the units of the activations; position counts from 0 inside the sequence.
-- Parameters: feature bigint, threshold double = 0
-- Ask it:  where does feature 12 exceed 0.5?  from tokens_where(12, 0.5)
create or replace macro tokens_where(feature, threshold := 0) as table
with firing as materialized (
    select token_id, value
    from tokens_of_feature(feature)
    where is_beyond(value, threshold::double)
),
hits as materialized (
    select token_id, value, vocab_id_of(token_id) as vocab_id from firing
)
select token_id, value, stg_vocab.piece, places.key, places.source, token_id % context_length as position
from hits
asof join stg_document_places as places on hits.token_id >= places.first_token_id
join stg_vocab using (vocab_id)
cross join stg_shape
where token_id < end_token_id
order by token_id;
