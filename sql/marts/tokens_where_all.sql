-- All tokens at which several features are each beyond a threshold.
--
-- Grain:   one row per token, in corpus order.
-- Reads:   threshold_hits, token_places
-- Units:   features and thresholds are lists of one length, not empty. Beyond means above or, in a signed run and for a
--          threshold below zero, below. feature_values are in the order of features, in
--          the units of the activations; position counts from 0 inside the sequence.
-- Parameters: features bigint[], thresholds double[]
-- Ask it:  where do 12 and 34 both fire?  from tokens_where_all([12, 34], [0, 0.5])
create or replace macro tokens_where_all(features, thresholds) as table
with firing as materialized (
    select token_id, list(value order by place) as feature_values
    from threshold_hits(features, thresholds)
    group by token_id
    having count(distinct place) = coalesce(len(features), 0)
),
places as materialized (
    from token_places((select list(token_id) from firing))
)
select token_id, firing.feature_values, places.piece, places.key, places.source, places.position
from firing
join places using (token_id)
order by token_id;
