-- No (token, feature) has two values.
--
-- Grain:   one row per (token, feature) stored more than once.
-- Reads:   stg_token_major
-- Units:   n_rows counts the rows of the pair.
-- Ask it:  was a part encoded twice?
select token_id, feature_id, count(*) as n_rows
from stg_token_major
group by token_id, feature_id
having count(*) > 1
order by token_id, feature_id;
