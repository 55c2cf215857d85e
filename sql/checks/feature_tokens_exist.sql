-- Every token at which a feature fires exists and is real.
--
-- Grain:   one row per token that is missing or masked.
-- Reads:   stg_token_major, stg_tokens
-- Units:   n_features counts the features that fire there.
-- Ask it:  do the features belong to these tokens?
with homeless as materialized (
    select token_id from stg_token_major
    anti join (select token_id from stg_tokens where mask) using (token_id)
)
select token_id, count(*) as n_features, any_value(stg_tokens.mask) as mask
from homeless
left join stg_tokens using (token_id)
group by token_id
order by token_id;
