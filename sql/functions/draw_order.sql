-- Where a token comes in a random draw: tokens in the order of this text are shuffled.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   MD5 of "seed:token" as 32 hexadecimal digits: the same draw on every machine and in every version.
-- Ask it:  select draw_order(4711, 0)  -- c9fe673e345f0a6c25493b5af4081f92
create or replace macro draw_order(token, seed) as
md5((seed)::varchar || ':' || (token)::varchar);
