-- How many tokens there are at which several features are each beyond a threshold.
--
-- Grain:   one row.
-- Reads:   threshold_hits, stg_size
-- Units:   features and thresholds are lists of one length, as in tokens_where_all, whose rows n_tokens counts. density
--          is their share of the encoded tokens.
-- Parameters: features bigint[], thresholds double[]
-- Ask it:  how often do 12 and 34 both fire?  from count_where_all([12, 34], [0, 0.5])
create or replace macro count_where_all(features, thresholds) as table
with firing as (
    select token_id
    from threshold_hits(features, thresholds)
    group by token_id
    having count(distinct place) = len(features)
)
select (select count(*) from firing) as n_tokens, (select count(*) from firing) / n_encoded_tokens as density
from stg_size;
