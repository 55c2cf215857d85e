-- How often and how strongly features fire: a sample for a picture.
--
-- Grain:   one row per feature that fires, at most n of them drawn at random, in the order of the draw.
-- Reads:   stg_summaries, draw_order
-- Units:   density is a share of the encoded tokens; max_value is in the units of the activations. The draw is
--          draw_order(feature_id, 0).
-- Parameters: n bigint = 4000
-- Ask it:  do dense features fire more strongly?  from density_and_max(1000)
create or replace macro density_and_max(
    n := 4000
) as table
select feature_id, density, max_value, kind
from stg_summaries
where n_tokens > 0
order by draw_order(feature_id, 0), feature_id
limit n;
