-- The band of positions that a position lies in.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   band 0 is position 0; band b, from 1 on, holds the positions 2^(b - 1) to 2^b - 1.
-- Ask it:  select position_band(5)  -- 3
create or replace macro position_band(place) as
case when (place) = 0 then 0 else 1 + floor(log2(greatest(place, 1)))::bigint end;
