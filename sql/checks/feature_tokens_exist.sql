-- Every token at which a feature fires exists and is a real one.
--
-- Grain:   one row per token that is missing or masked.
-- Reads:   stg_token_major, stg_tokens
-- Units:   n_features counts the features said to fire there.
-- Ask it:  do the features belong to these tokens?
with fired as (
    select token_id, count(*) as n_features from stg_token_major group by token_id
)
select token_id, fired.n_features, stg_tokens.mask
from fired
left join stg_tokens using (token_id)
where stg_tokens.mask is distinct from true
order by token_id;
