-- A file of values holds only the features, or tokens, that its folder names say. Questions would never find others.
--
-- Grain:   one row per (order, range of a file) with a value outside the range.
-- Reads:   stg_feature_major, stg_token_major
-- Units:   low and high are the first and last feature or token of the range; n_outside counts values.
-- Ask it:  does a question about one feature open the right files?
select 'feature_major' as table_name, low, high, count(*) as n_outside
from stg_feature_major
where feature_id not between low and high
group by low, high
union all
select 'token_major', low, high, count(*)
from stg_token_major
where token_id not between low and high
group by low, high
order by 1, 2, 3;
