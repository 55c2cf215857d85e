-- The tokens at which a feature fires, with its values.
--
-- Grain:   one row per token, in no order.
-- Reads:   stg_feature_major (only the row groups of this feature)
-- Units:   value is in the units of the activations. It is an expression of two columns, because DuckDB would read the
--          values of all features for a condition on values alone, and for the greatest n, before it looks at features.
-- Ask it:  from tokens_of_feature(12)
create or replace macro tokens_of_feature(feature) as table
select token_id, case when token_id >= 0 then value end as value
from stg_feature_major
where feature_id = feature and feature between low and high;
