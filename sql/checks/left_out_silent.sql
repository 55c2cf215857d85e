-- No token that was left out, because its vector is too long, has values; and each is a real token of that entry.
--
-- Grain:   one row per token that breaks this.
-- Reads:   stg_left_out, stg_token_major, stg_tokens
-- Units:   n_values counts the token's values.
-- Ask it:  is what was left out really left out?
with found as materialized (
    select token_id, count(*) as n_values
    from stg_token_major
    where token_id in (select token_id from stg_left_out)
    group by token_id
)
select token_id, coalesce(n_values, 0) as n_values
from stg_left_out
left join found using (token_id)
left join stg_tokens on stg_tokens.token_id = stg_left_out.token_id and stg_tokens.vocab_id = stg_left_out.vocab_id
where n_values > 0 or stg_tokens.token_id is null
order by token_id;
