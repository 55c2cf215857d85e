-- Tokens where a feature is stronger than a threshold: all of them.
--
-- Grain:   one row per token at which value > threshold, in corpus order.
-- Reads:   stg_feature_major (only the row groups of this feature), token_places
-- Units:   value is in the units of the activations; position counts from 0 inside the sequence.
-- Parameters: feature bigint, threshold double = 0
-- Ask it:  where does feature 12 exceed 0.5?  from tokens_where(12, 0.5)
create or replace macro tokens_where(feature, threshold := 0) as table
with firing as materialized (
    select token_id, value
    from stg_feature_major
    where feature_id = feature and feature between low and high and value > threshold
),
places as materialized (
    from token_places((select list(token_id) from firing))
)
select token_id, firing.value, places.piece, places.key, places.source, places.position
from firing
join places using (token_id)
order by token_id;
